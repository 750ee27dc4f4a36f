"""What both programs tell Prometheus: values, names, the endpoint, and the documents."""
