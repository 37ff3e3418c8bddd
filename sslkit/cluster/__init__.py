"""Runs on a cluster: submitted through submitit, and queued again until they are done."""

from sslkit.cluster.submission import Resources, Submission, submit

__all__ = ["Resources", "Submission", "submit"]
