"""The dashboard: a read-only web page and API over the nights of one or several working trees."""
