"""What RMA's services share: where they listen, what they were granted of the machine, how documents are read.

A document comes in one of three forms, and is read by a child process behind one HTTP application.
It is no distribution: the wheel of each service carries its own copy (``force-include`` in its pyproject.toml), so a
service stays one thing to install, and there is no name on an index that a stranger could take.
"""
