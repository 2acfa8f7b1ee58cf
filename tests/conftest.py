def pytest_addoption(parser):
    parser.addoption("--golden", action="append", default=[], metavar="FILE",
                     help="check this file of reference figures in place of those in tests/golden (may be given several times)")
