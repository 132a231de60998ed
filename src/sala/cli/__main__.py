"""`python -m sala.cli` is `sala`."""

from sala.cli import main

main()
