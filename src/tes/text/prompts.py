"""The sentences that stand for a class."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tes.config import TextConfig
from tes.data.classes_file import ClassInfo
from tes.errors import TextError
from tes.text.encoder import encoders

DEFAULT_TEMPLATES = ("a photo of a {}",)  # the authors' prompt: no article by the name, no full stop

ENSEMBLE = ("ensemble",)
"""What `text.templates` is where the user asks for a task's many prompts."""


def with_templates(
    config: TextConfig, single: Sequence[str] | None, ensemble: Sequence[str] | None
) -> tuple[TextConfig, str | None]:
    """Fill in the prompts that come with the data.

    Args:
        config: As the user left it, or filled in already.
        single: What the data have for `templates: None`; None: nothing.
        ensemble: What they have for `templates: ensemble`; None: nothing.

    Returns:
        The settings, and whose prompts they are; None where nothing was filled in.

    Raises:
        TextError: `ensemble` was asked for, and the data have none.
    """
    if config.templates == ENSEMBLE:
        if ensemble is None:
            raise TextError(
                "`text.templates=ensemble` takes a task's prompts, and these data are no task; give templates with {}."
            )
        return config.model_copy(update={"templates": tuple(ensemble)}), "the task's ensemble, CLIP's"
    takes_prompts = encoders.get(config.encoder.partition(":")[0]).can_embed_sentences
    if config.templates is None and single is not None and takes_prompts:
        return config.model_copy(update={"templates": tuple(single)}), "the task's own"
    return config, None


def class_prompts(info: ClassInfo, templates: Sequence[str] | None = None, mix: bool = False) -> list[str]:
    """Return the sentences whose embeddings are averaged into the row of a class.

    Args:
        info: The class. Its `prompts` are taken as they are, a description as it is if the class's name stands in it,
            else as "name: description".
        templates: Prompts with one `{}` for the name; None: `DEFAULT_TEMPLATES`.
        mix: Take the templates too where the class has sentences of its own, which otherwise take their place.

    Raises:
        TextError: A template does not have exactly one `{}`.

    Example:
        >>> class_prompts(ClassInfo("sea_horse", "sea horse"))
        ['a photo of a sea horse']
        >>> class_prompts(ClassInfo("tick", "tick", descriptions=("A small arachnid.", "The tick feeds on blood.")))
        ['tick: A small arachnid.', 'The tick feeds on blood.']
    """
    templates = DEFAULT_TEMPLATES if templates is None else tuple(templates)
    for template in templates:
        if template.count("{}") != 1:
            raise TextError(
                f"The prompt template `{template}` (text.templates) must have exactly one {{}}, for the class's name."
            )
    described = [_with_name(description, info.name) for description in info.descriptions]
    own = [sentence for sentence in (*info.prompts, *described) if sentence.strip()]
    if own and not mix:
        return own
    return own + [template.replace("{}", info.name) for template in templates]


def _with_name(description: str, name: str) -> str:
    description = description.strip()
    # At the start of a word alone: "apples" names the apple, "elephants" does not name the ant.
    named = re.search(rf"(?<!\w){re.escape(name)}", description, re.IGNORECASE)
    return description if named or not description else f"{name}: {description}"
