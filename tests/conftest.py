"""Options of the test suite."""


def pytest_addoption(parser):
    parser.addoption(
        "--layers", type=int, default=200, metavar="N",
        help="how many random layers tests/test_parity.py compares in each runtime (default: %(default)s); "
             "three in ten more in the form of other converters")
