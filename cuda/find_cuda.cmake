# Decides whether the CUDA part is built, and enables the language: sets MOERUN_HAVE_CUDA.
#   MOERUN_CUDA = ON: it must be. OFF: it is not. AUTO: it is where a working nvcc >= 12 is found.
# Without CMAKE_CUDA_ARCHITECTURES or CUDAARCHS, builds for the card at hand, or else for 8.0 and
# 9.0, with PTX for what comes later.
set(MOERUN_HAVE_CUDA OFF)
if(NOT MOERUN_CUDA)
  return()
endif()

# Ends in MOERUN_HAVE_CUDA = OFF, or in an error where CUDA was asked for.
macro(moerun_no_cuda reason)
  if(MOERUN_CUDA STREQUAL "AUTO")
    message(STATUS "CUDA: not built (${reason})")
  else()
    message(FATAL_ERROR "MOERUN_CUDA is ${MOERUN_CUDA}, but ${reason}")
  endif()
endmacro()

if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(MOERUN_NVCC nvcc HINTS "$ENV{CUDA_PATH}/bin" "$ENV{CUDA_HOME}/bin"
    PATHS /usr/local/cuda/bin)
  if(NOT MOERUN_NVCC)
    moerun_no_cuda("nvcc was not found")
    return()
  endif()
  set(ENV{CUDACXX} "${MOERUN_NVCC}")
endif()

if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
  execute_process(COMMAND nvidia-smi -L OUTPUT_VARIABLE _cards ERROR_QUIET RESULT_VARIABLE _failed)
  if(NOT _failed AND _cards MATCHES "GPU 0")
    set(CMAKE_CUDA_ARCHITECTURES native)
  else()
    set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real 90-virtual)
  endif()
endif()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  set(_for "")
  if(DEFINED ENV{CUDAARCHS})  # perhaps newer, or older, than this nvcc
    set(_for ", or does not know CUDAARCHS=$ENV{CUDAARCHS}")
  endif()
  moerun_no_cuda("$ENV{CUDACXX} does not work with ${CMAKE_CXX_COMPILER}${_for}")
  return()
endif()
execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --version OUTPUT_VARIABLE _nvcc ERROR_QUIET)
if(NOT _nvcc MATCHES "release ([0-9]+)\\.([0-9]+)" OR CMAKE_MATCH_1 LESS 12)
  moerun_no_cuda("${CMAKE_CUDA_COMPILER} is older than CUDA 12")
  return()
endif()
enable_language(CUDA)
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 does not know that nvcc 12 and later can
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
endif()
find_package(CUDAToolkit REQUIRED)
set(MOERUN_HAVE_CUDA ON)

set(MOERUN_CUDA_ARCHITECTURES ${CMAKE_CUDA_ARCHITECTURES})
if(MOERUN_CUDA_ARCHITECTURES STREQUAL "native")
  set(MOERUN_CUDA_ARCHITECTURES ${CMAKE_CUDA_ARCHITECTURES_NATIVE})
endif()
message(STATUS "CUDA: ${CMAKE_CUDA_COMPILER_VERSION}, for ${MOERUN_CUDA_ARCHITECTURES}")
