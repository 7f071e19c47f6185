package install

import (
	"context"
	"fmt"
	"os/exec"
	"strconv"
	"strings"

	version "github.com/containerd/containerd/api/services/version/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/emptypb"
)

// ContainerdVersion asks the containerd at a socket which one it is, such as "2.4.2".
func ContainerdVersion(ctx context.Context, socket string) (string, error) {
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return "", err
	}
	defer func() { _ = conn.Close() }()
	answer, err := version.NewVersionClient(conn).Version(ctx, &emptypb.Empty{})
	if err != nil {
		return "", err
	}
	return answer.Version, nil
}

// ProgramVersion is the version of a containerd program, which need not run.
func ProgramVersion(ctx context.Context, program string) (string, error) {
	out, err := exec.CommandContext(ctx, program, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("%s --version: %w", program, err)
	}
	// "containerd github.com/containerd/containerd/v2 v2.4.2 ..."
	for _, word := range strings.Fields(string(out)) {
		if parseRelease(word).major > 0 {
			return strings.TrimPrefix(word, "v"), nil
		}
	}
	return "", fmt.Errorf("%s --version says nothing of a version: %q", program, out)
}

// release is the part of containerd's version that decides what its configuration means.
// Without one it is zero.
type release struct {
	major, minor int
	guessed      bool // from the format of its configuration
}

// parseRelease reads "v2.4.2" and "1.6.20~ds1"; zero where it cannot be told.
func parseRelease(s string) release {
	parts := strings.SplitN(strings.TrimPrefix(s, "v"), ".", 3)
	if len(parts) < 2 {
		return release{}
	}
	major, err := strconv.Atoi(parts[0])
	minor, minorErr := strconv.Atoi(parts[1])
	if err != nil || minorErr != nil {
		return release{}
	}
	return release{major: major, minor: minor}
}

// or is r, or where that is not known what the format of a configuration tells: containerd
// 1.x has formats 1 and 2. 2.x takes them too, so only format 3 is certain.
func (r release) or(format int) release {
	switch {
	case r.major > 0:
		return r
	case format >= 3:
		return release{2, 1, true}
	default:
		return release{1, 6, true}
	}
}

func (r release) before(major, minor int) bool {
	return r.major < major || r.major == major && r.minor < minor
}
