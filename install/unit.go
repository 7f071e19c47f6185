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
func (u *Unit) content() string {
	command := unitWord(u.Binary) + " node"
	if u.ConfigFile != "" {
		command += " --config " + unitWord(u.ConfigFile)
	}
	runtime := ""
	if u.RuntimeDir != "" {
		runtime = "RuntimeDirectory=" + u.RuntimeDir + "\nRuntimeDirectoryMode=0700\n"
	}
	return fmt.Sprintf(`[Unit]
Description=accel node: container images from a cache on this machine
After=network.target
Before=containerd.service

[Service]
Type=notify
ExecStart=%s
Restart=always
RestartSec=1
TimeoutStartSec=60
TimeoutStopSec=30
KillMode=mixed
%sUMask=0077
LimitNOFILE=1048576
OOMScoreAdjust=-900

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
