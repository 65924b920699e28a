"""What a kit runs on the host that it is for, before the harness can run there: nothing here may
import anything beyond Python's standard library."""
