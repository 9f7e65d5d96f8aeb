"""The tests: a folder for each package, shared fakes and builders in `helpers`."""
