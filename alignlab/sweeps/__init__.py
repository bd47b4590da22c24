"""Sweeps: `alignlab train -m …` and `alignlab compare -m …`.

    overrides ─ settings.chosen ─→ launcher, sweeper and the overrides of the runs
              ─ combinations.Composer ─→ Combination: what varies, its overrides, its config, its node
              ─ grid: all of them │ search.Search: Optuna's trials, a batch at a time
              ─ launch.Launch ─→ a graph of nodes that wait for nothing, and its executor: here, or Slurm
              ─ results.gather ─→ sweep.json, sweep.csv, sweep.md, sweep.html and a table

The graph (`comparison.graph`) knows what is done, half done and failed; what a run has measured is in its folder. In
the sweep's folder are also `sweep.json` (what it consists of, written before anything is launched) and `study.log` (a
search's trials). Hydra composes the runs' configs; its launchers are not used: basic runs them in one process, where
what kills one kills all; joblib does not stop its processes; submitit waits for jobs in order, and gives up at the
first that is lost.
"""
