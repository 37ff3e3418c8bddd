"""Write and read files that stay whole when a process is killed or the disk is full. Read `atomic` first."""
