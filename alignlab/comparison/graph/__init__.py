"""One graph of runs, keyed by content, and two executors: here and Slurm.

    node      what a part consists of, its key, what has become of it; all of it is in the part's folder
    work      runs the commands of one node, in whichever process: `alignlab node FOLDER`
    local     executor: processes on this machine, several at a time
    process   a node's process on this machine, forked from one that has loaded the libraries
    slurm     executor: jobs and arrays of a cluster, through submitit; `wait` sees them to their end
    job       what a job runs
    ledger    which job of the cluster has which part

A comparison is such a graph; a sweep is one whose nodes wait for nothing. In the folder of the whole is `nodes.json`
(name and key of each node, as last planned) and, where a cluster has a part of it, `submitted.json`. In the folder of a
node:

    node.json     what it is to do, and its key
    done.json     written last: it has been done, with the key that it had then
    failed.json   why it failed, and the log that says more; removed when it begins again
    lock          locked while a process of this machine is at work on it
    log.txt       what that process wrote

So whatever is killed, the same command goes on: done are the nodes whose `done.json` has the key of the plan.
"""
