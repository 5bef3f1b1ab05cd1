"""The tests, in the folders of what they test. Found before the package `tests` that the akavesdk installs."""
