"""The main job: one run of the suite, its pool of servers, and judging a saved run again."""
