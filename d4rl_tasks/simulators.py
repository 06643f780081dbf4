"""The environments of D4RL's six families: first states, controls, observations, rewards and ends, equal to D4RL's.

Today's gymnasium has other rules for tasks of these names. In D4RL, Hopper and Walker2d pay the bonus for being alive
also on the step that ends an episode; the ant observes its position but not its goal; dropping the pen ends the
episode; the kitchen has other noise and observations.
"""

import gymnasium
import numpy as np

from d4rl_tasks.models import cells, model_of, mujoco

CAMERAS = {  # the other families' models have cameras that follow them
    "antmaze": {"distance": 60.0, "elevation": -90.0},
    "pen": {"distance": 1.0, "azimuth": -45.0},
    "kitchen": {"distance": 2.2, "azimuth": 70.0, "elevation": -35.0, "lookat": np.array([-0.2, 0.5, 2.0])},
}


class Simulated(gymnasium.Env):
    """What all families share: MuJoCo's model and data, and the gymnasium interface around a family's rules.

    The rules are start (initial positions and velocities), control (the motors' input), observe, and judge (the reward,
    and whether the episode ends).
    """

    def __init__(self, env_id: str, render_mode: str | None = None):
        self.family, self.variant = env_id.split("-")[:2]
        self.frame_skip = {"hopper": 4, "walker2d": 4, "kitchen": 40}.get(self.family, 5)  # MuJoCo's steps in one step
        self.model = model_of(self.family, self.variant if self.family == "antmaze" else "")
        self.data = mujoco.MjData(self.model)
        self.dt = self.frame_skip * self.model.opt.timestep
        self.render_mode, self.renderer = render_mode, None
        self.metadata = {"render_modes": ["human", "rgb_array", "depth_array"], "render_fps": round(1 / self.dt)}
        # A step's cost, as evaluations of forces times degrees of freedom: halfcheetah 45, hopper 96, walker2d 144, pen
        # 150, antmaze 280, kitchen 1160. 20 environments in threads on two cores are 0.66, 1.46, 1.56, 1.7, 1.79 and
        # 1.93 times as fast as in turn, for threads also wait for Python's lock.
        forces = self.frame_skip * (4 if self.model.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4 else 1)
        self.threads_gain = forces * self.model.nv >= 90

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        mujoco.mj_resetData(self.model, self.data)
        self.set_state(*self.start(self.np_random, seed is not None))
        return self.observe(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        x, control = self.data.qpos[0], self.control(np.asarray(action))
        self.data.ctrl[:] = control
        mujoco.mj_step(self.model, self.data, nstep=self.frame_skip)
        observation = self.observe()
        reward, terminated = self.judge(observation, control, (self.data.qpos[0] - x) / self.dt)
        return observation, float(reward), bool(terminated), False, {}

    def set_state(self, qpos: np.ndarray, qvel: np.ndarray) -> None:
        """Sets positions (nq,) and velocities (nv,)."""
        self.data.qpos[:], self.data.qvel[:] = qpos, qvel
        mujoco.mj_normalizeQuat(self.model, self.data.qpos)  # mj_forward once did this, so observations show it
        mujoco.mj_forward(self.model, self.data)

    def control(self, action: np.ndarray) -> np.ndarray:
        """d4rl's NormalizedBoxEnv, in the action's own precision: equal to the last bit of float32."""
        high = self.model.actuator_ctrlrange[0, 1].astype(action.dtype)
        return np.clip((action + 1) * high - high, -high, high)

    def render(self) -> np.ndarray | None:
        if self.renderer is None:
            from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer

            camera = CAMERAS.get(self.family)
            self.renderer = MujocoRenderer(self.model, self.data, camera, 480, 480, camera_id=None if camera else 0)
        return self.renderer.render(self.render_mode)

    def close(self) -> None:
        if self.renderer is not None:
            self.renderer.close()


class Locomotion(Simulated):
    """HalfCheetah, Hopper and Walker2d of gym's v2."""

    def start(self, rng: np.random.Generator, seeded: bool) -> tuple[np.ndarray, np.ndarray]:
        nv = self.model.nv
        if self.family == "halfcheetah":
            return self.model.qpos0 + rng.uniform(-0.1, 0.1, nv), 0.1 * rng.standard_normal(nv)
        return self.model.qpos0 + rng.uniform(-0.005, 0.005, nv), rng.uniform(-0.005, 0.005, nv)

    def observe(self) -> np.ndarray:
        limit = np.inf if self.family == "halfcheetah" else 10
        return np.concatenate([self.data.qpos[1:], np.clip(self.data.qvel, -limit, limit)])

    def judge(self, observation: np.ndarray, control: np.ndarray, speed: float) -> tuple[float, bool]:
        effort = float(np.square(control).sum())
        if self.family == "halfcheetah":
            return speed - 0.1 * effort, False
        height, angle = self.data.qpos[1:3]
        if self.family == "hopper":
            rest = np.concatenate([self.data.qpos[2:], self.data.qvel])
            alive = height > 0.7 and abs(angle) < 0.2 and (np.abs(rest) < 100).all()
        else:
            alive = 0.8 < height < 2 and -1 < angle < 1
        return speed + 1 - 1e-3 * effort, not alive


class AntMaze(Simulated):
    """AntMaze-v0 of d4rl: reward 1 at the goal, where the episode ends, and 0 elsewhere.

    The goal is drawn once per environment, as in d4rl, and anew by a reset with a seed, from that seed.
    """

    goal = None  # xy

    def start(self, rng: np.random.Generator, seeded: bool) -> tuple[np.ndarray, np.ndarray]:
        if self.goal is None or seeded:
            cell = cells(self.variant, "G")[0]
            self.goal = np.maximum(cell + rng.uniform(0, 1, 2) + rng.uniform(0, 0.5, 2), 0)
        return self.model.qpos0 + rng.uniform(-0.1, 0.1, 15), 0.1 * rng.standard_normal(14)

    def observe(self) -> np.ndarray:
        return np.concatenate([self.data.qpos, self.data.qvel])

    def judge(self, observation: np.ndarray, control: np.ndarray, speed: float) -> tuple[float, bool]:
        there = np.linalg.norm(observation[:2] - self.goal) <= 0.5
        return there, there


class Pen(Simulated):
    """Adroit's pen of d4rl: turn it to the orientation of the target; dropping it ends the episode."""

    def start(self, rng: np.random.Generator, seeded: bool) -> tuple[np.ndarray, np.ndarray]:
        half = rng.uniform(-1, 1, 2) / 2  # turns about x and y
        (sx, sy), (cx, cy) = np.sin(half), np.cos(half)
        self.set_target(np.array([cx * cy, sx * cy, cx * sy, sx * sy]))
        return self.model.qpos0, np.zeros(self.model.nv)

    def set_target(self, quaternion: np.ndarray) -> None:
        self.data.mocap_quat[self.model.body("target").mocapid] = quaternion

    def control(self, action: np.ndarray) -> np.ndarray:
        low, high = self.model.actuator_ctrlrange.T
        return (low + high) / 2 + np.clip(action, -1, 1) * ((high - low) / 2)

    def observe(self) -> np.ndarray:
        data = self.data
        place = data.body("Object").xpos
        axis = (data.site("object_top").xpos - data.site("object_bottom").xpos) / 0.13  # their distance
        target = (data.site("target_top").xpos - data.site("target_bottom").xpos) / 0.13
        away = place - data.site("eps_ball").xpos
        return np.concatenate([data.qpos[:-6], place, data.qvel[-6:], axis, target, away, axis - target])

    def judge(self, observation: np.ndarray, control: np.ndarray, speed: float) -> tuple[float, bool]:
        distance, likeness = np.linalg.norm(observation[39:42]), observation[33:36] @ observation[36:39]
        near, dropped = distance < 0.075, observation[26] < 0.075
        bonus = 10 * (near and likeness > 0.9) + 50 * (near and likeness > 0.95)
        return likeness - distance + bonus - 5 * dropped, dropped


KITCHEN_START = np.array([
    0.148388023, -1.76848573, 1.84390296, -2.4768576, 0.260252026, 0.712533105, 1.59515394, 0.0479267505, 0.0371350919,
    -2.6627985e-4, -5.18043486e-5, 3.1287722e-5, -4.51199853e-5, -3.90842156e-6, -4.22629655e-5, 6.28065475e-5,
    4.04984708e-5, 4.62730939e-4, -2.26906415e-4, -4.65501369e-4, -6.44129196e-3, -1.77048263e-3, 1.08009684e-3,
    -0.26939744, 0.350383255, 1.61944683, 1.00618764, 4.0639512e-3, -6.62095997e-3, -2.68278933e-4,
])  # fmt: skip
KITCHEN_NOISE = 0.1 * np.repeat([0.1, 5e-3, 5e-4, 5e-3, 0.1, 5e-3, 0.1, 5e-3], [9, 2, 6, 3, 3, 3, 3, 1])
KITCHEN_LOW = np.array([-2.9, -1.8, -2.9, -3.1, -2.9, 0, -2.9, 0, 0])  # limits of the robot's nine joints
KITCHEN_HIGH = np.array([2.9, 1.8, 2.9, 0, 2.9, 3.8, 2.9, 0.04, 0.04])
KITCHEN_GOALS = {  # for each thing the indices of its positions, and their target values
    "bottom burner": ([11, 12], [-0.88, -0.01]),
    "light switch": ([17, 18], [-0.69, -0.05]),
    "slide cabinet": ([19], [0.37]),
    "microwave": ([22], [-0.75]),
    "kettle": ([23, 24, 25, 26, 27, 28, 29], [-0.23, 0.75, 1.62, 0.99, 0.0, 0.0, -0.06]),
}


class Kitchen(Simulated):
    """FrankaKitchen of d4rl: reward 1 for each of four things when it first reaches its goal; the end when all have."""

    def __init__(self, env_id: str, render_mode: str | None = None):
        super().__init__(env_id, render_mode)
        fourth = "bottom burner" if self.variant == "mixed" else "slide cabinet"
        self.things = ("microwave", "kettle", "light switch", fourth)
        self.noise, self.goal = KITCHEN_NOISE, np.zeros(30)
        for places, values in (KITCHEN_GOALS[thing] for thing in self.things):
            self.goal[places] = values

    def start(self, rng: np.random.Generator, seeded: bool) -> tuple[np.ndarray, np.ndarray]:
        self.todo = set(self.things)
        return KITCHEN_START, np.zeros(self.model.nv)

    def control(self, action: np.ndarray) -> np.ndarray:
        """Speeds of at most 2, as position targets: observed (noisy) positions plus speed times dt, within limits."""
        return np.clip(self.seen[:9] + 2 * np.clip(action, -1, 1).astype(float) * self.dt, KITCHEN_LOW, KITCHEN_HIGH)

    def observe(self) -> np.ndarray:
        self.seen = self.data.qpos + self.noise * self.np_random.uniform(-1, 1, 30)
        return np.concatenate([self.seen, self.goal])

    def judge(self, observation: np.ndarray, control: np.ndarray, speed: float) -> tuple[float, bool]:
        off = self.seen - self.goal
        done = {thing for thing in self.todo if np.linalg.norm(off[KITCHEN_GOALS[thing][0]]) < 0.3}
        self.todo -= done
        return len(done), not self.todo


FAMILIES = dict.fromkeys(("halfcheetah", "hopper", "walker2d"), Locomotion)
FAMILIES |= {"antmaze": AntMaze, "pen": Pen, "kitchen": Kitchen}
