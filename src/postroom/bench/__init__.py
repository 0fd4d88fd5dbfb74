"""``postroom bench``: the speed of Postroom on this machine and this broker, with jobs that do nothing."""
