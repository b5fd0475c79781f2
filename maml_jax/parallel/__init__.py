"""Tasks over devices and processes, and the choice of implementation by backend."""
