"""`python -m compression_dags.cli`."""

from compression_dags.cli.main import main

main()
