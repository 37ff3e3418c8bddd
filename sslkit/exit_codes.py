"""Exit codes of the commands. 0 is success, 1 an internal error or a run that cannot continue."""

BAD_INPUT = 2  # also: sslkit data check --strict found bad images
RESUMABLE = 75  # stopped on request; the same command continues the run (EX_TEMPFAIL of sysexits.h)
INTERRUPTED = 130  # Typer's exit code for Ctrl-C
