package install

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	systemd = "/lib/systemd/systemd"
	// Paths inside of the machine that systemd runs.
	shared    = "/shared" // with the test
	heldFile  = "/run/accel/holder.pid"
	heldMount = "/run/accel/lazyfs"
)

// play runs this program in another part of TestTheUnitUnderSystemd; false: it is the test.
func play(args []string) bool {
	if len(args) < 2 {
		return false
	}
	parts := map[string]func() error{"boot": func() error { return boot(args[2]) }, "sweep": sweep, "node": playNode, "holder": playHolder, "operator": playOperator}
	part, ok := parts[args[1]]
	if !ok {
		return false
	}
	if err := part(); err != nil {
		fmt.Fprintln(os.Stderr, args[1]+":", err)
		os.Exit(1)
	}
	return true
}

// playNode stands for the daemon: it starts a holder where none lives, which mounts, and says that
// it is up.
func playNode() error {
	if _, err := holder(); err != nil {
		h := exec.Command(os.Args[0], "holder")
		h.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		if err := h.Start(); err != nil {
			return err
		}
	}
	conn, err := net.Dial("unixgram", os.Getenv("NOTIFY_SOCKET"))
	if err != nil {
		return err
	}
	if _, err := conn.Write([]byte("READY=1")); err != nil {
		return err
	}
	select {} // SIGTERM ends it
}

func playHolder() error {
	if err := errors.Join(os.MkdirAll(heldMount, 0o700), unix.Mount("held", heldMount, "tmpfs", 0, "")); err != nil {
		return err
	}
	if err := os.WriteFile(heldFile, []byte(strconv.Itoa(os.Getpid())), 0o600); err != nil {
		return err
	}
	select {}
}

// holder is the process that lives, with the mount that everybody sees.
func holder() (pid string, err error) {
	raw, err := os.ReadFile(heldFile)
	if err != nil {
		return "", err
	}
	mounts, err := os.ReadFile("/proc/1/mounts") // as containerd sees them
	if err != nil {
		return "", err
	}
	if !strings.Contains(string(mounts), "held "+heldMount+" ") {
		return "", fmt.Errorf("its mount is gone from %s", mounts)
	}
	_, err = os.Stat("/proc/" + string(raw))
	return string(raw), err
}

// operator does to the unit what people and machines do; what it reports the test reads.
type operator struct {
	errs []error
	held string // the holder's process
}

func playOperator() error {
	var o operator
	o.ctl("daemon-reload")
	o.ctl("start", "accel-node")
	o.held, _ = await(unitPatience, holder)
	o.stillHeld("the first start")
	for _, name := range []string{"pid", "mnt"} {
		link, err := os.Readlink(filepath.Join("/proc", o.held, "ns", name))
		first, _ := os.Readlink("/proc/1/ns/" + name)
		o.check(err == nil && link == first, "the holder's namespace %s is %s, not systemd's %s (%v)", name, link, first, err)
	}
	result := "done"
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-900"), 0o600); err != nil {
		result += fmt.Sprintf("; NOT TESTED: OOMScoreAdjust, nobody may lower it here (%v)", err)
	} else {
		score, _ := os.ReadFile(filepath.Join("/proc", o.held, "oom_score_adj"))
		o.check(strings.TrimSpace(string(score)) == "-900", "the holder's oom_score_adj is %s", score)
	}
	for i := range 6 { // more than the start limit that systemd has by default
		if len(o.errs) > 0 {
			break
		}
		before := o.main()
		o.ctl("kill", "--kill-whom=main", "--signal=KILL", "accel-node")
		after, err := await(unitPatience, func() (string, error) {
			now := o.main()
			if now == before || now == "0" {
				return "", fmt.Errorf("the daemon is process %s after its kill, it was %s", now, before)
			}
			return now, nil
		})
		o.check(err == nil && after != "", "kill %d: %v", i, err)
		o.stillHeld("a kill")
	}
	o.ctl("restart", "accel-node")
	o.stillHeld("a restart")
	o.ctl("stop", "accel-node")
	o.check(len(o.errs) > 0 || o.main() == "0", "the daemon runs after a stop")
	o.stillHeld("a stop")
	o.ctl("start", "accel-node")
	o.stillHeld("a start")

	if err := errors.Join(o.errs...); err != nil {
		result = err.Error()
	}
	return os.WriteFile(filepath.Join(shared, "result"), []byte(result), 0o600)
}

func (o *operator) check(ok bool, format string, args ...any) {
	if !ok {
		o.errs = append(o.errs, fmt.Errorf(format, args...))
	}
}

func (o *operator) ctl(args ...string) {
	if len(o.errs) > 0 {
		return // what follows would say the same at length
	}
	out, err := exec.Command("systemctl", args...).CombinedOutput()
	o.check(err == nil, "systemctl %v: %v: %s", args, err, out)
}

func (o *operator) main() string {
	out, err := exec.Command("systemctl", "show", "--property=MainPID", "--value", "accel-node").Output()
	o.check(err == nil, "systemctl show: %v", err)
	return strings.TrimSpace(string(out))
}

func (o *operator) stillHeld(after string) {
	if len(o.errs) > 0 {
		return
	}
	held, err := await(unitPatience, holder)
	o.check(err == nil && held == o.held, "after %s the holder is process %s, it was %s (%v)", after, held, o.held, err)
}

const (
	unitPatience    = 20 * time.Second // for what the unit does within a second
	machinePatience = 3 * time.Minute
)

// await asks until there is an answer.
func await(patience time.Duration, ask func() (string, error)) (answer string, err error) {
	for end := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		if answer, err = ask(); err == nil || time.Now().After(end) {
			return answer, err
		}
	}
}

const cgroups = "/sys/fs/cgroup"

// ownGroup is where the machine's control groups are, in those of the test.
const ownGroup = "accel-test-systemd"

// boot becomes a machine's systemd: the process is the first of its namespaces. What that writes
// goes to memory, over the real files.
func boot(dir string) error {
	at := func(parts ...string) string { return filepath.Join(append([]string{dir}, parts...)...) }
	mount := func(source, target, kind string, flags uintptr, data string) error {
		if err := os.MkdirAll(target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(source, target, kind, flags, data); err != nil {
			return fmt.Errorf("mount %s on %s: %w", kind, target, err)
		}
		return nil
	}
	err := errors.Join(
		mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
		// Its control groups are below one of its own, which is the first that it sees.
		mount("cgroup2", at("groups"), "cgroup2", 0, ""), enterGroup(at("groups")), unix.Unshare(unix.CLONE_NEWCGROUP),
		mount("tmpfs", at("over"), "tmpfs", 0, ""), os.MkdirAll(at("over", "files"), 0o755), os.MkdirAll(at("over", "work"), 0o755),
		mount("overlay", at("root"), "overlay", 0, fmt.Sprintf("lowerdir=/,upperdir=%s,workdir=%s", at("over", "files"), at("over", "work"))),
		mount("proc", at("root", "proc"), "proc", 0, ""), mount("sysfs", at("root", "sys"), "sysfs", 0, ""),
		mount("cgroup2", at("root", cgroups), "cgroup2", 0, ""),
		mount("/dev", at("root", "dev"), "", unix.MS_BIND|unix.MS_REC, ""),
		mount("tmpfs", at("root", "run"), "tmpfs", 0, ""), mount("tmpfs", at("root", "tmp"), "tmpfs", 0, ""),
		mount(at("shared"), at("root", shared), "", unix.MS_BIND, ""),
	)
	for _, unit := range []string{UnitPath, operatorPath} {
		text, readErr := os.ReadFile(at("shared", filepath.Base(unit)))
		err = errors.Join(err, readErr, os.WriteFile(at("root", unit), text, 0o644))
	}
	if err = errors.Join(err, unix.Chroot(at("root")), os.Chdir("/")); err != nil {
		return err
	}
	return unix.Exec(systemd, []string{systemd, "--unit=" + filepath.Base(operatorPath), "--log-target=console", "--show-status=no"},
		[]string{"container=accel-test", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"})
}

const (
	operatorPath = "/etc/systemd/system/operator.service"
	operatorUnit = `[Unit]
DefaultDependencies=no
[Service]
Type=oneshot
ExecStart=` + shared + `/accel operator
StandardError=file:` + shared + `/operator.log
TimeoutStartSec=infinity
`
)

func enterGroup(top string) error {
	group, err := ownGroupBelow(top)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(group, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(group, "cgroup.procs"), []byte("0"), 0o644)
}

// ownGroupBelow is the group's folder, below that of this process.
func ownGroupBelow(top string) (string, error) {
	raw, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(raw)) {
		if path, ok := strings.CutPrefix(line, "0::"); ok {
			return filepath.Join(top, strings.TrimSpace(path), ownGroup), nil
		}
	}
	return "", errors.New("this machine has no control groups of version 2")
}

// sweep removes the empty groups that a machine leaves; it runs in a mount namespace of its own.
func sweep() error {
	if err := errors.Join(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""), unix.Mount("cgroup2", "/mnt", "cgroup2", 0, "")); err != nil {
		return err
	}
	group, err := ownGroupBelow("/mnt")
	if err != nil {
		return err
	}
	var groups []string
	err = filepath.WalkDir(group, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			groups = append(groups, path)
		}
		return err
	})
	for _, path := range slices.Backward(groups) {
		err = errors.Join(err, os.Remove(path))
	}
	return err
}

// TestTheUnitUnderSystemd runs the unit that install writes under a real systemd, in a machine of its
// own: whatever happens to the daemon, the process that serves lazy mounts lives on.
func TestTheUnitUnderSystemd(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED, NOT TESTED: a machine of its own needs root")
	}
	if _, err := os.Stat(systemd); err != nil {
		t.Skip("SKIPPED, NOT TESTED: no systemd here: ", err)
	}
	dir := t.TempDir()
	both := filepath.Join(dir, "shared")
	u := Unit{Binary: shared + "/accel", ConfigFile: "/etc/accel/node.yaml", RuntimeDir: "accel"}
	self, err := os.Open("/proc/self/exe")
	if err == nil {
		err = os.Mkdir(both, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer self.Close()
	program, err := os.OpenFile(filepath.Join(both, "accel"), os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.Copy(program, self)
	err = errors.Join(err, program.Close(),
		os.WriteFile(filepath.Join(both, filepath.Base(UnitPath)), []byte(marked(u.content())), 0o600),
		os.WriteFile(filepath.Join(both, filepath.Base(operatorPath)), []byte(operatorUnit), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	machine := exec.Command("/proc/self/exe", "boot", dir)
	machine.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC, Pdeathsig: syscall.SIGKILL,
	}
	said, err := machine.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	machine.Stdout = machine.Stderr
	if err := machine.Start(); err != nil {
		t.Fatal(err)
	}
	var log strings.Builder
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for s := bufio.NewScanner(said); s.Scan(); {
			fmt.Fprintln(&log, s.Text())
		}
	}()
	result, err := await(machinePatience, func() (string, error) {
		raw, err := os.ReadFile(filepath.Join(both, "result"))
		if err == nil && len(raw) == 0 {
			err = io.ErrUnexpectedEOF
		}
		return string(raw), err
	})
	killed := machine.Process.Kill()
	<-ended
	_ = machine.Wait() // it was killed
	broom := exec.Command("/proc/self/exe", "sweep")
	broom.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	if out, sweepErr := broom.CombinedOutput(); errors.Join(killed, sweepErr) != nil {
		t.Error(killed, sweepErr, string(out))
	}
	t.Log(result)
	if err != nil || !strings.HasPrefix(result, "done") {
		operator, _ := os.ReadFile(filepath.Join(both, "operator.log"))
		t.Errorf("%v\noperator: %s\nsystemd:\n%s", err, operator, log.String())
	}
}
