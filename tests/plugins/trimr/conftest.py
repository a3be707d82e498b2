def pytest_addoption(parser):
    parser.addoption("--trimr-traces", type=int, default=4_000, help="traces compared with the specification (100000)")
