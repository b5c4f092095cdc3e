"""The dashboard: a read-only web page and API for the nights of one or several working trees."""
