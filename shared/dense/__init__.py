"""Detection and segmentation through mmdet and mmseg, without a compiler; needs the extra of `make setup-dense`."""
