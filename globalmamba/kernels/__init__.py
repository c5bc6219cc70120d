"""One folder per operation; each offers one public function with several backends."""
