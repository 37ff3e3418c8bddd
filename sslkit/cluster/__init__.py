"""Submit runs to a Slurm cluster with submitit; jobs are requeued until the run is finished."""

from sslkit.cluster.submission import Resources, Submission, submit

__all__ = ["Resources", "Submission", "submit"]
