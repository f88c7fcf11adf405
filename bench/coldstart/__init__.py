"""What a cold adapter costs: its own request, the others, and the store, over the whole suite.

The suite runs as processes on the CPU with the real model; adapters of about 40 MB lie on a real S3
server (SeaweedFS). The pool holds few of them and host memory a few more, so that each request's
tier is known; what counts is the tier that the suite itself reports. The kinds of request take
turns; the figures are medians.
"""

from bench.coldstart.run import run

__all__ = ["run"]
