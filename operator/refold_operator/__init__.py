"""The operator: EventStream and Projection resources → Kafka, PostgreSQL and Deployments."""
