package meter_test

const (
	killPath = "ACCEL_METER_TEST_PATH"
	killRun  = "ACCEL_METER_TEST_RUN"
)

func beKilled(path, run string) {}
