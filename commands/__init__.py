"""What the Makefile calls: tables of claims, reproduction, evaluation, one row, data. These programs start papers."""
