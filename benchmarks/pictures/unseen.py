from benchmarks.pictures.problem import Problem
PROBLEMS: tuple[Problem, ...] = ()
