"""The ``companion`` command: one module a command, imported only when it is called."""
