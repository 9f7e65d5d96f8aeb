"""The web server: settings, middleware, sign-in, metrics, logs."""
