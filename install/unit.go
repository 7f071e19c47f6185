package install

import (
	"fmt"
	"strings"
)

// UnitPath is where the systemd unit goes.
const UnitPath = "/etc/systemd/system/accel-node.service"

// Unit describes the service.
type Unit struct {
	Binary     string // accel's own path
	ConfigFile string // empty: the default file, or none
	// RuntimeDir is the folder of the admin socket where that lies directly below /run.
	RuntimeDir string
}

// content is the unit. It starts before containerd, which may be asked for images at
// once, but containerd does not need it: what the node does not answer is fetched from
// the registry. It does not wait for the network, which would hold containerd up. The
// node tells systemd when it listens (Type=notify).
//
// The process that serves lazy mounts is a child of the daemon in a session of its own, and
// stays in the unit's control group. That it outlives the daemon takes KillMode=process; a
// scope of its own would take a bus to ask for it, which is not there in every machine.
func (u *Unit) content() string {
	command := unitWord(u.Binary) + " node"
	if u.ConfigFile != "" {
		command += " --config " + unitWord(u.ConfigFile)
	}
	runtime := ""
	if u.RuntimeDir != "" {
		runtime = `# Lazy mounts lie in it, which outlive the daemon.
RuntimeDirectory=` + u.RuntimeDir + `
RuntimeDirectoryPreserve=yes
RuntimeDirectoryMode=0700
`
	}
	return fmt.Sprintf(`[Unit]
Description=accel node: container images from a cache on this machine
After=network.target
Before=containerd.service
# Containers read by way of the node: it is started again however often it ends.
StartLimitIntervalSec=0

[Service]
Type=notify
ExecStart=%s
Restart=always
RestartSec=1
TimeoutStartSec=60
TimeoutStopSec=30
# Only the daemon is stopped. The process that serves lazy mounts lives on, and with it the
# containers; the next daemon finds it. (By hand: systemctl kill --kill-whom=main.)
KillMode=process
# When one of the two runs out of memory, the other is not stopped for it.
OOMPolicy=continue
OOMScoreAdjust=-900
%sUMask=0077
LimitNOFILE=1048576
# No Private...=, Protect...=, ReadWritePaths= and the like: with any of them the daemon has a mount
# namespace of its own, and containerd does not see what it mounts.

[Install]
WantedBy=multi-user.target
`, command, runtime)
}

// unitWord quotes a word for a unit file; % and $ stand for themselves.
func unitWord(s string) string {
	s = strings.NewReplacer(`\`, `\\`, `"`, `\"`, `%`, `%%`, `$`, `$$`, "\n", `\n`).Replace(s)
	if strings.ContainsAny(s, " \t'\"\\") || s == "" {
		return `"` + s + `"`
	}
	return s
}
