"""What RMA's document services share: a request in three forms, a child process for each document, the HTTP around it.

It is no distribution: the wheel of each service carries its own copy (``force-include`` in its pyproject.toml), so a
service stays one thing to install, and there is no name on an index that a stranger could take.
"""
