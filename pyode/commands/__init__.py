"""What `python -m pyode` can do, a module for each command."""
