"""Start-up shared by the jobs of a workflow: one process imports the libraries, and forks itself for each job.

`start` runs in Snakemake's main process, `server` in the process that forks, `client` in a job's shell.
"""
