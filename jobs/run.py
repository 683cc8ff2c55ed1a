"""What `ray job submit` runs: `mahalo` on the cluster that the job is on.

    ray job submit --working-dir . -- python jobs/run.py run examples/quickstart.yaml
    ray job submit --working-dir . -- python jobs/run.py policy my.yaml --set policy.beta=0.05

The arguments are those of the command `mahalo`. `output` has to be a place that every node can reach.
"""

from mahalo_ray.cli import main

main()
