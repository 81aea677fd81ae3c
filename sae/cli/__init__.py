"""The command `sae`; it imports torch only once a request has been checked."""
