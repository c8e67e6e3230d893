"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const isText = !head.classList.contains("num") && !body.rows[0].cells[column].dataset.key;
      const wasFirst = head.getAttribute("aria-sort") === (isText ? "ascending" : "descending");
      const sign = wasFirst === isText ? -1 : 1;
      const key = (row) => row.cells[column].dataset.key ?? row.cells[column].textContent.trim();
      const rows = [...body.rows].sort((a, b) =>
        sign * (isText ? key(a).localeCompare(key(b)) : Number(key(a)) - Number(key(b))));
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
      body.append(...rows);
    });
  });
}
