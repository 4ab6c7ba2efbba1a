"""``python -m drs_course.checks``: the checks, where their exercises are, and what answer each expects."""

from drs_course import checks


def table():
    """The checks in the order of the exercises, one line each."""
    found = [getattr(checks, name).exercise for name in checks.__all__]
    found.sort(key=lambda exercise: (exercise.notebook, exercise.number, exercise.name))
    width = max(len(one.name) for one in found)
    return "\n".join(f"{one.notebook}  {one.number:<3} {one.name:<{width}}  {one.answer}" for one in found)


if __name__ == "__main__":
    print("notebook, exercise, check, answer")
    print(table())
