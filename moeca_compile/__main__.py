"""`python -m moeca_compile`: the command `moeca`."""

from moeca_compile.command.main import main

raise SystemExit(main())
