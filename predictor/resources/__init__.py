"""What this machine or container grants: CPU time, memory, threads."""
