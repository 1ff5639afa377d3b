"""What calls have planned is kept, and not without bound."""
from edgeattn.runtime.plan_cache import PlanCache, planned


def test_a_cache_holds_as_many_plans_as_it_may():
    plans = PlanCache(3)
    for length in range(100):
        assert plans.keep(length, [length]) == [length] and len(plans) <= 3
    assert plans[99] == [99]


def test_the_same_arguments_are_planned_once_and_others_anew():
    made = []

    def plan(*arguments):
        made.append(arguments)
        return list(arguments)

    def other(*arguments):
        return arguments

    assert planned(plan, 1, (2, 3)) is planned(plan, 1, (2, 3)) and made == [(1, (2, 3))]
    assert planned(plan, 1, (2, 4)) == [1, (2, 4)] and planned(other, 1, (2, 3)) == (1, (2, 3))
