"""What surrounds the paper: conversion, export, figures, benchmarks, GPU evidence."""
