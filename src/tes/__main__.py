from tes.cli import main

main()
