"""Distribution of tasks over devices and processes, and choices of implementation by backend."""
