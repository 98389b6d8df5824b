"""The engine: regions, slots, replays, sessions, random state, ambient state, verification."""

from distckpt.engine.api import checkpoint as checkpoint
from distckpt.engine.api import checkpoint_sequential as checkpoint_sequential
from distckpt.engine.inputs import pin as pin
from distckpt.engine.region import is_recomputing as is_recomputing
from distckpt.engine.sessions import Session as Session
from distckpt.engine.sessions import session as session
