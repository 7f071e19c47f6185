package main

// A form is how an image lies in the registry.
type form string

const (
	plainForm     form = "plain"     // as it was built, gzip layers
	stockForm     form = "stock"     // eStargz by the stock library at its defaults
	optimisedForm form = "optimised" // that, with what a start was recorded to read in front
	// Forms of accel have the name of the plain one, each in a repository of its own: beside
	// the image lies accel's conversion with its signed mapping, and a profile.
	accelForm     form = "mapping"
	predictedForm form = "mapping+predicted" // the profile that comes of the files alone
	recordedForm  form = "mapping+recorded"  // the profile of one start that a node has recorded, and its boot bundle
	rangesForm    form = "mapping+ranges"    // that without the bundle
)

func (f form) ofAccel() bool {
	return f == accelForm || f == predictedForm || f == recordedForm || f == rangesForm
}

// A system gives containerd its snapshots.
type system string

const (
	overlayfs   system = "overlayfs"    // containerd's own, at its defaults
	stargz      system = "stargz"       // the stock stargz-snapshotter at its defaults
	stargzTuned system = "stargz-tuned" // the same with the settings of tuned
	accelNode   system = "accel"        // accel node
)

// A moment is what there is on the node when the clock starts.
type moment int

const (
	cold      moment = iota // nothing; the pull counts
	warm                    // all that a start needs, page cache included; no pull
	coldCache               // all, on disk; no pull
)

// variant is one line of the comparison.
type variant struct {
	name   string
	note   string
	system system
	form   form
	at     moment
	all    bool // another program is started instead, which reads every file and ends; over the first network only
}

func (v variant) String() string { return v.name }

// isPeer reports whether v is somebody else's cold start.
func (v variant) isPeer() bool { return v.at == cold && !v.all && v.system != accelNode }

// variants run in this order, round after round.
var variants = []variant{
	{name: "overlayfs", note: "full pull, containerd's defaults", system: overlayfs, form: plainForm},
	{name: "stargz", note: "not optimised image; passthrough, 8 tasks, asynchronous prefetch of 5 MB requests", system: stargzTuned, form: stockForm},
	{name: "stargz-untuned", note: "not optimised image, default settings", system: stargz, form: stockForm},
	{name: "stargz-optimised", note: "recorded and prioritised image, default settings", system: stargz, form: optimisedForm},
	{name: "stargz-optimised-tuned", note: "recorded and prioritised image, settings as for stargz", system: stargzTuned, form: optimisedForm},
	{name: "accel", note: "plain name, no profile", system: accelNode, form: accelForm},
	{name: "accel-predicted", note: "plain name, profile predicted from the image's files", system: accelNode, form: predictedForm},
	{name: "accel-profile", note: "plain name, profile of one recorded start", system: accelNode, form: recordedForm},
	{name: "accel-ranges", note: "the same without a boot bundle", system: accelNode, form: rangesForm},
	{name: "overlayfs-all", note: "full pull, then reads every file", system: overlayfs, form: plainForm, all: true},
	{name: "stargz-all", note: "reads every file; settings as for stargz", system: stargzTuned, form: stockForm, all: true},
	{name: "accel-all", note: "reads every file", system: accelNode, form: accelForm, all: true},
	{name: "overlayfs-warm", note: "all local", system: overlayfs, form: plainForm, at: warm},
	{name: "stargz-warm", note: "all local", system: stargzTuned, form: stockForm, at: warm},
	{name: "accel-warm", note: "all local", system: accelNode, form: accelForm, at: warm},
	{name: "overlayfs-cold-cache", note: "all local, page cache dropped", system: overlayfs, form: plainForm, at: coldCache},
	{name: "stargz-cold-cache", note: "all local, page cache dropped", system: stargzTuned, form: stockForm, at: coldCache},
	{name: "accel-cold-cache", note: "all local, page cache dropped", system: accelNode, form: accelForm, at: coldCache},
}

// names lists variants, or images.
func names[T interface{ String() string }](of []T) []string {
	list := make([]string, len(of))
	for i, x := range of {
		list[i] = x.String()
	}
	return list
}
