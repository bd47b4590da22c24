"""Sweeps: `alignlab train -m …` and `alignlab compare -m …`.

    words ─ settings.chosen ─→ launcher, sweeper and the words of the runs
          ─ combinations.Composer ─→ Combination: a folder, what varies, its words, its config
          ─ grid: all of them │ search.Search: Optuna's trials, a batch at a time
          ─ launch.Launch ─→ leaves out what is finished or at work, hands the rest to Hydra's launcher
                             (basic, joblib; submitit by slurm.launch), shows how many are done
          ─ job.Job ─→ what a launcher calls, in whichever process: trains or compares, in the combination's folder
          ─ results.gather ─→ sweep.json, sweep.csv, sweep.md, sweep.html and a table

What a run has come to is on disk, in its own folder, and nowhere else (`state`): `result.json` or a leaderboard:
finished; `pruned.json`: given up by a search; `failed.json`: why, and where its log is; none of these: unfinished. So
a sweep may be killed at any moment, its runs may be anywhere, and the same command goes on with what is not finished.
In the sweep's folder are `sweep.json` (what it consists of, written before anything is launched), `study.log` (a
search's trials) and `jobs.json` (which Slurm job has which run, so that none is started twice).
"""
