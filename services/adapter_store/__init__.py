"""The adapter store: the registry of adapters, and their bytes.

Owns names, versions, aliases and digests, the check and conversion of what is published, and the
streaming of weights. All state is in object storage; what a process keeps is a mirror and a disk
cache, so that any number of replicas can run on the same storage. Called by gateways (`Watch`,
`Get`), workers (`Download`) and people (`Publish` and the rest).
"""
