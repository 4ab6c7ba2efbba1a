"""``python -m drs_course.checks``: the checks, where their exercises are, and what answer each expects."""

from drs_course import checks


def table():
    """The checks in the order of the exercises, one line each."""
    found = sorted((getattr(checks, name).exercise for name in checks.__all__), key=lambda e: e.place)
    width = max(len(exercise.name) for exercise in found)
    return "\n".join(
        f"{exercise.notebook}  {exercise.number:<3} {exercise.name:<{width}}  {exercise.answer}"
        for exercise in found
    )


if __name__ == "__main__":
    print("notebook, exercise, check, answer")
    print(table())
