"""The command line `kehu`."""
